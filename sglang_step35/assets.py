"""The files that come with the package: the nano checkpoint, the presets, the published config.json."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent

NANO = _PACKAGE / "nano"
# Installed, `configs/` lies inside the package; in a checkout beside it.
CONFIGS = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"
PUBLISHED_CONFIG = CONFIGS / "step-3.5-flash.config.json"
HELDOUT_PROMPTS = NANO / "heldout_prompts.json"


class UnknownPreset(ValueError):
    """No preset has this name; the message lists those there are."""


def presets() -> list[str]:
    """Names of all presets."""
    return sorted(file.stem for file in CONFIGS.glob("*.yaml"))


def preset(name: str) -> Path:
    """The file of a preset, for `sglang serve --config`. Raises UnknownPreset."""
    if name not in presets():
        raise UnknownPreset(f"no preset {name!r}; presets: {', '.join(presets())}")
    return CONFIGS / f"{name}.yaml"
