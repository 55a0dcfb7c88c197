# SPDX-License-Identifier: Apache-2.0
"""Plans: compiles the real step ahead of time for a target machine, and reports memory, collectives and time.

machine.py parses machine names and creates compile-only devices; program.py compiles; hlo.py reads the collectives of
a compiled program; roofline.py turns counts into seconds; train.py and infer.py plan training and inference;
report.py prints them. docs/scaling.md explains every number.
"""
