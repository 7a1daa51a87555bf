"""The parts of a GPU day: what `gpu_day` runs, and how it survives crashes, hangs and kills."""
