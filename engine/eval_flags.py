"""Flags of eval.py that cannot work, found before anything is loaded."""

from engine.stream import MODES
from files.errors import DataError
from files.writing import writable


def check_flags(cfg, given, published):
    """Raises DataError for flags that make no sense."""
    if cfg.mode not in MODES or not -1 <= cfg.steps <= 32 or (cfg.steps >= 0 and cfg.mode != "latent"):
        raise DataError(f"--mode {cfg.mode!r} --steps {cfg.steps}: mode is one of {MODES}, steps are 0..32 "
                        "and belong to mode latent")
    if cfg.protocol not in ("clean", "released"):
        raise DataError(f"--protocol {cfg.protocol!r}: needs clean or released")
    if cfg.batch_size < 1 or cfg.limit < 1 or not writable(cfg.json):
        raise DataError(f"--batch_size {cfg.batch_size} and --limit {cfg.limit} must be at least 1, --json "
                        f"{cfg.json!r} a file in a folder that exists")
    if "protocol" in given and not published:
        raise DataError(f"--protocol: for MMEB-V2 only; --data {cfg.data!r} has no rows/, image-tasks/, "
                        "video-tasks/ or visdoc-tasks/")
    if cfg.data and given & {"moves", "rules", "codes"}:
        raise DataError("--moves, --rules and --codes are turtle world's: leave them out, or --data")
    if not 0 <= cfg.done <= 1 or ("done" in given and cfg.mode != "auto"):
        raise DataError(f"--done {cfg.done}: needs a probability, 0 .. 1, and --mode auto")
    if cfg.skip_bad and not published:
        raise DataError("--skip_bad: for MMEB-V2 only")
