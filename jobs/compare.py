"""The command `sarm compare` as a script, which a cluster can be given. `sarm.commands.compare` says what it does, with examples."""

from sarm.commands.compare import COMMAND

if __name__ == "__main__":
    COMMAND.run()
