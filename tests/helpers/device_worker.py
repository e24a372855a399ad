"""Run by test_devices.py: the cases of `device_cases` on the CPU and on the pretended device; prints what is wrong.

python device_worker.py FOLDER [CASE …]
"""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from pathlib import Path

from device_cases import CASES, differences, write_pairs

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    folder, names = Path(sys.argv[1]), sys.argv[2:] or list(CASES)
    if not (folder / "encoder" / "b").exists():
        write_pairs(folder)
    before = {}
    wrong: dict[str, list[str]] = {}
    for name in names:
        try:
            before[name] = CASES[name](folder, "cpu")
        except Exception:
            wrong[name] = ["on the CPU:", *traceback.format_exc().splitlines()[-12:]]
    from pretended import NAME, pretend

    pretended = pretend()
    for name in before:
        pretended.calls = 0
        with pretended as device:
            try:
                found = CASES[name](folder, NAME)
                wrong[name] = list(differences(before[name], found, 1e-4))
                if not device.calls:
                    wrong[name].append("nothing was computed on the device")
            except Exception:
                wrong[name] = [line for line in traceback.format_exc().splitlines() if "registered at" not in line]
    print(json.dumps(wrong))
