# SPDX-License-Identifier: Apache-2.0
"""Plans: the real step, lowered and compiled for a machine that is not here, and what it needs there.

machine.py knows the names of machines and makes their devices; program.py compiles; hlo.py reads the collectives of
a compiled program; roofline.py turns counts into seconds; train.py and infer.py put the two kinds of plans together;
report.py prints them. docs/scaling.md says how every number comes about.
"""
