"""A Weights & Biases run with a separate key and service process, both cleared at its end.

Within a process, wandb keeps from one run to the next: the key of the last login, the settings from
the environment and from files, the account of the key, and the connection to wandb-core, the
service process that sends the data. On a server the next run may be another user's, and a service
process that died would be used forever. So all of it is cleared when a run ends.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.tracking import WandBTracker

from trainer.settings import Secret

# Variables that an operator may set for all users: server, mode, output. All other variables of
# wandb refer to an account or to one of its runs.
_SERVER_VARIABLES = {
    *("WANDB_BASE_URL", "WANDB_APP_URL", "WANDB_MODE", "WANDB_SILENT", "WANDB_QUIET"),
    *("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_HTTP_TIMEOUT", "WANDB_INIT_TIMEOUT"),
    *("WANDB_ERROR_REPORTING", "WANDB_INSECURE_DISABLE_SSL"),
}
_SERVICE = "WANDB_SERVICE"  # set by wandb to the address of its service process


class WandBRun(WandBTracker):
    """Accelerate's tracker in a separate wandb session.

    With `from_request` only the given key is used, and nothing of the server's operator is read or
    sent: no environment, settings file or netrc, no name of the machine or its files.
    """

    def __init__(
        self,
        project: str,
        name: str | None,
        entity: str | None,
        folder: Path,
        key: Secret | None,
        from_request: bool,
    ) -> None:
        import wandb
        from wandb.sdk import wandb_setup

        self._folder, self._from_request = folder, from_request
        self._forgotten, self._forgetting = False, threading.Lock()
        # A session that existed before belongs to the calling program.
        self._own = from_request or wandb_setup._singleton is None
        options: dict[str, Any] = {} if key is None else {"api_key": key.reveal()}
        if from_request:
            options |= {"x_disable_meta": True, "x_disable_machine_info": True, "host": "server"}
        super().__init__(
            project,
            name=name,
            entity=entity,
            dir=str(folder),
            # Set for this run only: wandb.login would write the key into the home folder.
            settings=wandb.Settings(console="off", disable_git=True, save_code=False, **options),
        )

    def start(self) -> None:
        """Starts the run; raises wandb's exceptions."""
        if not self._from_request:
            super().start()
            return
        _clear()  # of the calling program, or of a run that could not clean up
        with _without_accounts(self._folder):
            super().start()

    def finish(self) -> None:
        """Sends the remaining data and ends the session."""
        try:
            super().finish()
        finally:
            self.forget()

    def forget(self) -> None:
        """Ends wandb's service process and clears wandb's state in this process.

        Sends the remaining data first, which may block for as long as the network does. Done only
        once: later, the state in this process is that of the next run.
        """
        with self._forgetting:
            if self._own and not self._forgotten:
                self._forgotten = True
                _clear()

    def kill(self) -> None:
        """Kills the service process; calls that wait for it then return."""
        from wandb.sdk import wandb_setup

        connection = getattr(wandb_setup._singleton, "_connection", None)
        service = getattr(connection, "_proc", None) if self._own else None
        if service is not None:
            service._process.kill()


def _clear() -> None:
    """Ends wandb's service process, and clears key, settings and account in this process."""
    import wandb

    for _ in range(2):  # if the service process is dead, the second call clears the login
        try:
            wandb.teardown()
            break
        except (Exception, SystemExit):
            continue
    os.environ.pop(_SERVICE, None)


@contextmanager
def _without_accounts(folder: Path) -> Iterator[None]:
    """Context in which wandb reads no account of the operator: environment, files, netrc."""
    import wandb

    before = dict(os.environ)
    read_files = wandb.Settings.update_from_system_settings
    for name in before:
        if name.startswith("WANDB_") and name not in _SERVER_VARIABLES:
            del os.environ[name]
    os.environ |= {"WANDB_DIR": str(folder), "NETRC": os.devnull}
    # No setting turns off the settings file of the working folder.
    wandb.Settings.update_from_system_settings = lambda self: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        wandb.Settings.update_from_system_settings = read_files  # type: ignore[method-assign]
        for name in {"NETRC", *(n for n in os.environ if n.startswith("WANDB_"))}:
            os.environ.pop(name, None)
        os.environ |= {
            name: value
            for name, value in before.items()
            if name == "NETRC" or name.startswith("WANDB_")
        }
