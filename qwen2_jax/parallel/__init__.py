# SPDX-License-Identifier: Apache-2.0
"""Devices and hosts: meshes and sharding rules, the exchange of expert rows, chip data, multi-host jobs."""
