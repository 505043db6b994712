"""The command `sarm debias` as a script, which a cluster can be given. `sarm.commands.debias` says what it does, with examples."""

from sarm.commands.debias import COMMAND

if __name__ == "__main__":
    COMMAND.run()
