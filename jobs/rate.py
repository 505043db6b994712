"""The command `sarm rate` as a script, which a cluster can be given. `sarm.commands.rate` says what it does, with examples."""

from sarm.commands.rate import COMMAND

if __name__ == "__main__":
    COMMAND.run()
