"""The command `sarm ui` as a script, which a cluster can be given. `sarm.commands.ui` says what it does, with examples."""

from sarm.commands.ui import COMMAND

if __name__ == "__main__":
    COMMAND.run()
