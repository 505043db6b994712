"""The flags of `jobs/serve.py`."""

import ipaddress
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from sarm.settings.checks import UserError, check, check_least
from sarm.settings.results_root import READ, WRITTEN, place_paths

MIN_TOKEN = 16


@dataclass(frozen=True, kw_only=True)
class Serving:
    """One reward model behind HTTP: our own route, and those of the frameworks that train policies."""

    common: ClassVar[tuple[str, ...]] = ("model", "host", "port", "token", "variants", "threads", "replicas")
    model: Path = field(metadata=READ)
    """SARM folder."""
    edit: Path | None = field(default=None, metadata=READ)
    """Folder of an edit of features inside the model, with which it is served. Unset: the folder `feature_edit` in the model's, if it is there."""
    name: str = ""
    """What clients call the model; unset: the folder's name."""
    host: str = "127.0.0.1"
    """Address to listen on: this machine alone, unless there is a --token."""
    port: int = 8000
    """Port to listen on; 0: a free one, which is printed."""
    token: str = field(default="", metadata=READ)
    """Where the token is read that every scoring route then wants: `env:NAME` or `file:PATH`."""
    variants: tuple[str, ...] = field(default=(), metadata=READ)
    """`NAME=FILE` of edited heads, which are scored beside the model's own: the `edit.json` that `jobs/steer.py` writes."""
    variants_folder: Path | None = field(default=None, metadata=WRITTEN)
    """Folder in which variants that are posted are kept over restarts; unset: they last as long as the server."""
    policy_tokenizer: Path | None = field(default=None, metadata=READ)
    """Folder of the policy's tokenizer: texts in its chat template are scored as the messages that they hold."""
    on_foreign_text: Literal["refuse", "warn"] = "refuse"
    """Texts in no known template: `refuse` them, or `warn` with a flag and score prompt and answer as they stand, where the prompt is sent too."""
    on_truncated: Literal["close", "refuse", "penalise"] = "close"
    """Answers that were cut off before their end of turn: `close` and flag them, `refuse` them, or `penalise` them with the model's fixed reward."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the model's body; heads are float32."""
    batch_tokens: int | None = None
    """Tokens of one forward pass; unset: 1,024 on cores, 16,384 on a GPU."""
    threads: int | None = None
    """Cores of a forward pass; unset: all."""
    max_wait: float = 100.0
    """Seconds of work that may wait; what comes beyond is refused at once, and told when to come again."""
    cached: int = 4096
    """Answers whose readings are kept, for those that come again."""
    contexts: Path | None = field(default=None, metadata=READ)
    """contexts/v1 folder whose terms name latents in explanations; unset: `contexts` beside the model if it is there, and of this model."""
    explanations: Path | None = field(default=None, metadata=READ)
    """explanations/v1 folder whose explanations name them; unset: `explanations` beside the model if it is there, and of this model."""
    drift_folder: Path | None = field(default=None, metadata=WRITTEN)
    """Folder in which the watch over reward hacking keeps its steps over restarts; unset: they last as long as the server."""
    step_answers: int = 256
    """Answers that make a step of a run that does not say its steps."""
    watched: tuple[int, ...] = ()
    """Latents whose contributions Prometheus is shown."""
    mlflow_uri: str = ""
    """MLflow (server, or absolute sqlite path) that the watch logs to, one MLflow run for each run; unset: none."""
    experiment: str = "reward drift"
    """MLflow experiment of the watch."""
    replicas: int = 0
    """Replicas of the server behind one address, by Ray Serve; 0: one server in this process, without Ray."""
    max_replicas: int | None = None
    """Up to how many there are while requests come in numbers; unset: as many as --replicas."""
    ray_address: str = ""
    """Ray cluster on which the replicas run (`auto`, `HOST:PORT`). Empty: a local one."""
    debug: bool = False
    """Show the tracebacks of errors."""

    def __post_init__(self) -> None:
        place_paths(self)
        check(self, "port", 0 <= self.port < 65536, "between 0 and 65535")
        check(self, "max_wait", 0 < self.max_wait < 86400, "above 0 and below a day")
        check_least(self, "", batch_tokens=64, threads=1, cached=0, step_answers=1, replicas=0)
        check(self, "max_replicas", self.max_replicas is None or self.max_replicas >= self.replicas > 0, "at least --replicas, which is named too")  # fmt: skip
        if self.mlflow_uri and self.drift_folder is None:
            raise UserError("MLflow's records wait in a folder while it is away, and none is named. Pass --drift-folder FOLDER with --mlflow-uri.")  # fmt: skip
        if self.token and self.token.partition(":")[0] not in ("env", "file"):
            # Not shown: it may be the token itself.
            raise UserError("a token's place is env:NAME or file:PATH. Pass --token so, never the token itself.")
        if not self.is_loopback and not self.token:
            raise UserError(f"--host {self.host} is reached from other machines, and there is no token. Pass --token env:NAME or file:PATH, or leave --host out.")  # fmt: skip
        names = [text.partition("=")[0] for text in self.variants]
        if wrong := [text for text in self.variants if "=" not in text]:
            raise UserError(f"a variant is NAME=FILE, got {wrong[0]!r}. Pass --variants.")
        if repeated := [name for name in names if names.count(name) > 1]:
            raise UserError(f"the variant {repeated[0]} is named twice. Pass each of --variants once.")

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches the server."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def read_token(self) -> str | None:
        """The token, None where none is asked for. Raises UserError where the variable or the file is missing, empty or short."""
        if not self.token:
            return None
        kind, _, place = self.token.partition(":")
        if kind == "file":
            try:
                token = Path(place).expanduser().read_text().strip()
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"the token's file {place} cannot be read: {error}. Pass --token file:PATH.") from None
        else:
            token = os.environ.get(place, "").strip()
        if len(token) < MIN_TOKEN or not token.isascii() or not token.isprintable() or set(" /?#%") & set(token):
            raise UserError(f"the token in {place} is missing, or is not {MIN_TOKEN} printable characters of ASCII at least without / ? # %. Write one there, e.g. of `openssl rand -hex 24`.")  # fmt: skip
        return token
