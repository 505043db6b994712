"""The command `sarm train-sae` as a script, which a cluster can be given. `sarm.commands.train_sae` says what it does, with examples."""

from sarm.commands.command import command_of

if __name__ == "__main__":
    command_of("train_sae").run()
