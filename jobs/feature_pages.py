"""The command `sarm feature-pages` as a script, which a cluster can be given. `sarm.commands.feature_pages` says what it does, with examples."""

from sarm.commands.command import command_of

if __name__ == "__main__":
    command_of("feature_pages").run()
