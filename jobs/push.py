"""The command `sarm push` as a script. `sarm.commands.push` says what it does, with examples."""

from sarm.commands.command import command_of

if __name__ == "__main__":
    command_of("push").run()
