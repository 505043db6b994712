"""The version of the rules that turn a conversation into the token whose activation is rewarded; declared here alone.

1   control tokens spelled in contents became control tokens; the last end of turn was rewarded, the prompt's if the answer had none
2   contents are encoded as text; the rewarded token follows the last place where the template opens an answer

Rewards of two versions differ for texts that the rules treat differently, and for no others. A file of its own, without torch: exported
models carry a copy, and manifests are read without either.
"""

PROTOCOL_VERSION = 2
