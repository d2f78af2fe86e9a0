"""Every shipped configuration can be loaded."""

from __future__ import annotations

from configs import presets as shipped
from configs.presets import ConfigError, load, load_cluster, preset_names
from utils.run.checks import Finding


def presets() -> Finding:
    """Presets and descriptions of sites are read, merged and validated as a run would do it."""
    experiments, clusters = preset_names(shipped.PRESETS), preset_names(shipped.CLUSTERS)
    if not experiments or not clusters:
        return "no", f"found {len(experiments)} presets and {len(clusters)} clusters in {shipped.PRESETS}"
    faults = []
    for names, read in ((experiments, load), (clusters, load_cluster)):
        for name in names:
            try:
                read(name)
            except ConfigError as error:
                faults.append(str(error))
    return ("no", "\n".join(faults)) if faults else ("ok", f"{len(experiments)} presets and {len(clusters)} clusters are valid")
