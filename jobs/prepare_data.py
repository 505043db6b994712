"""The command `sarm prepare-data` as a script, which a cluster can be given. `sarm.commands.prepare_data` says what it does, with examples."""

from sarm.commands.prepare_data import COMMAND

if __name__ == "__main__":
    COMMAND.run()
