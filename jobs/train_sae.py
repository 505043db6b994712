"""The command `sarm train-sae` as a script, which a cluster can be given. `sarm.commands.train_sae` says what it does, with examples."""

from sarm.commands.train_sae import COMMAND

if __name__ == "__main__":
    COMMAND.run()
