"""The command `sarm extract-activations` as a script, which a cluster can be given. `sarm.commands.extract_activations` says what it does, with examples."""

from sarm.commands.command import command_of

if __name__ == "__main__":
    command_of("extract_activations").run()
