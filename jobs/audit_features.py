"""The command `sarm audit-features` as a script, which a cluster can be given. `sarm.commands.audit_features` says what it does, with examples."""

from sarm.commands.command import command_of

if __name__ == "__main__":
    command_of("audit_features").run()
