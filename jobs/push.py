"""The command `sarm push` as a script. `sarm.commands.push` says what it does, with examples."""

from sarm.commands.push import COMMAND

if __name__ == "__main__":
    COMMAND.run()
