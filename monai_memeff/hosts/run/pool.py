"""Worker processes, each with the bundle loaded once; one that dies takes its own study with it and no other."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait

from monai_memeff.errors import InputError, message
from monai_memeff.hosts.run.studies import Study
from monai_memeff.hosts.run.worker import Outcome, Settings, Worker


def outcomes(settings: Settings, studies: Sequence[Study], workers: int) -> Iterator[Outcome]:
    """Work on studies, and give each one's outcome when it is there.

    Args:
        settings: what the command says.
        studies: in the order in which they begin.
        workers: processes; 1 works in this one.

    Raises:
        InputError: the bundle cannot be loaded.
    """
    if workers == 1 or len(studies) < 2:
        work = Worker(settings)
        yield from map(work, studies)
        return
    waiting = list(reversed(studies))
    running = [_Process(settings) for _ in range(min(workers, len(studies)))]
    try:
        while running:
            ready = wait([process.pipe for process in running])
            for process in [process for process in running if process.pipe in ready]:
                outcome, alive = process.receive()
                if outcome is not None:
                    yield outcome
                if alive and waiting:
                    process.give(waiting.pop())
                    continue
                process.stop()
                running.remove(process)
                running += [_Process(settings)] if waiting else []
    finally:
        for process in running:
            process.stop()


class _Process:
    def __init__(self, settings: Settings) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.study: Study | None = None
        self.process = context.Process(target=_serve, args=(other, settings), daemon=True)
        self.process.start()
        other.close()

    def give(self, study: Study) -> None:
        """Send the next study."""
        self.study = study
        self.pipe.send(study)

    def receive(self) -> tuple[Outcome | None, bool]:
        """The outcome of the study, if there was one; and whether the process lives.

        Raises:
            InputError: the bundle cannot be loaded, or the process died before it was.
        """
        try:
            found = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            why = f"its process ended with status {self.process.exitcode} (-9: killed, too little memory as a rule)"
            if self.study is None:
                raise InputError(f"a worker could not start: {why}; use fewer --workers") from None
            return Outcome(self.study.name, False, f"{self.study.name}: {why}"), False
        if isinstance(found, str):
            raise InputError(found)
        return found, True

    def stop(self) -> None:
        """End the process."""
        self.pipe.close()
        self.process.terminate()
        self.process.join()


def _serve(pipe: Connection, settings: Settings) -> None:
    """In the process: load, say so, and work until nothing comes any more."""
    from monai_memeff.hosts.run.offline import no_network

    with no_network():
        try:
            work = Worker(settings)
        except (InputError, OSError, MemoryError, ModuleNotFoundError) as error:
            pipe.send(message(error))
            return
        pipe.send(None)
        try:
            while True:
                pipe.send(_outcome(work, pipe.recv()))
        except (EOFError, OSError, KeyboardInterrupt):
            return


def _outcome(work: Worker, study: Study) -> Outcome | str:
    """How a study ended; what ends the whole command, such as a full disk, as its message."""
    try:
        return work(study)
    except OSError as error:
        return message(error)
