"""Flags of eval.py that cannot work: refused before anything is loaded."""

from adapter import MAX_STEPS
from engine.stream import MODES
from files.errors import DataError
from files.writing import writable


def check_flags(cfg, given, published):
    """Raises DataError; given: names of the flags; published: whether --data is a copy of MMEB-V2."""
    if cfg.mode not in MODES or not -1 <= cfg.steps <= MAX_STEPS or (cfg.steps >= 0 and cfg.mode != "latent"):
        raise DataError(f"--mode {cfg.mode!r} --steps {cfg.steps}: mode is one of {MODES}, steps are "
                        f"0..{MAX_STEPS} and belong to mode latent")
    if cfg.index not in ("", cfg.mode, "latent" if cfg.mode == "single" else "single"):
        raise DataError(f"--index {cfg.index!r}: needs single, or latent with --mode single: the mode of "
                        "corpora where it is not that of queries")
    if cfg.protocol not in ("clean", "released"):
        raise DataError(f"--protocol {cfg.protocol!r}: needs clean or released")
    if cfg.batch_size < 1 or cfg.limit < 1 or not writable(cfg.json):
        raise DataError(f"--batch_size {cfg.batch_size} and --limit {cfg.limit} must be at least 1, --json "
                        f"{cfg.json!r} a file in a folder that exists")
    if not published and ("protocol" in given or cfg.skip_bad):
        raise DataError(f"--protocol and --skip_bad: for MMEB-V2 only; --data {cfg.data!r} has no rows/, "
                        "image-tasks/, video-tasks/ or visdoc-tasks/")
    if cfg.data and given & {"moves", "rules", "codes"}:
        raise DataError("--moves, --rules and --codes are turtle world's: leave them out, or --data")
    if not 0 <= cfg.done <= 1 or ("done" in given and cfg.mode != "auto"):
        raise DataError(f"--done {cfg.done}: needs a probability, 0 .. 1, and --mode auto")


def check_model(cfg, model):
    """Raises DataError for flags that cannot work with this checkpoint."""
    model_type, width = model.backbone.config.model_type, model.lm.config.hidden_size
    if cfg.protocol == "released" and model_type != "qwen2_vl":
        raise DataError(f"--protocol released is how a Qwen2-VL was scored; {cfg.ckpt} is a {model_type}")
    if not 0 <= cfg.dim <= width:
        raise DataError(f"--dim {cfg.dim}: the checkpoint has {width} components; 0: all of them")
