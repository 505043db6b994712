"""The command `sarm feature-pages` as a script, which a cluster can be given. `sarm.commands.feature_pages` says what it does, with examples."""

from sarm.commands.feature_pages import COMMAND

if __name__ == "__main__":
    COMMAND.run()
