"""The command `sarm interpret` as a script, which a cluster can be given. `sarm.commands.interpret` says what it does, with examples."""

from sarm.commands.interpret import COMMAND

if __name__ == "__main__":
    COMMAND.run()
