# SPDX-License-Identifier: Apache-2.0
"""Moving tensors between files and device arrays, on one host or several."""
