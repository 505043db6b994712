"""The command `sarm debias` as a script, which a cluster can be given. `sarm.commands.debias` says what it does, with examples."""

from sarm.commands.command import command_of

if __name__ == "__main__":
    command_of("debias").run()
