"""The command `sarm convert-sarm` as a script, which a cluster can be given. `sarm.commands.convert_sarm` says what it does, with examples."""

from sarm.commands.command import command_of

if __name__ == "__main__":
    command_of("convert_sarm").run()
