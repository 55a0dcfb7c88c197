# SPDX-License-Identifier: Apache-2.0
"""Runs DPO and GRPO on the mesh that the arguments give, for test_post_training.py: prints what they told as JSON.

python post_training_mesh.py BASE OUT '{"fsdp": 2, ...}'
"""

import importlib.util
import json
import sys
from pathlib import Path

import jax

base, out, mesh = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
jax.config.update("jax_num_cpu_devices", 8)
spec = importlib.util.spec_from_file_location("runs", Path(__file__).with_name("test_post_training.py"))
assert spec is not None
assert spec.loader is not None
runs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(runs)

told = {}
for name, config in runs.on_a_mesh(base, out, mesh).items():
    runs.run(config)
    told[name] = runs.lines_of(config.out)
print(json.dumps(told))
