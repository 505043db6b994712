"""The command `sarm steer` as a script, which a cluster can be given. `sarm.commands.steer` says what it does, with examples."""

from sarm.commands.steer import COMMAND

if __name__ == "__main__":
    COMMAND.run()
