"""The command `sarm train-sarm` as a script, which a cluster can be given. `sarm.commands.train_sarm` says what it does, with examples."""

from sarm.commands.train_sarm import COMMAND

if __name__ == "__main__":
    COMMAND.run()
