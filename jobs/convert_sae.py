"""The command `sarm convert-sae` as a script, which a cluster can be given. `sarm.commands.convert_sae` says what it does, with examples."""

from sarm.commands.command import command_of

if __name__ == "__main__":
    command_of("convert_sae").run()
