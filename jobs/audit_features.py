"""The command `sarm audit-features` as a script, which a cluster can be given. `sarm.commands.audit_features` says what it does, with examples."""

from sarm.commands.audit_features import COMMAND

if __name__ == "__main__":
    COMMAND.run()
