# SPDX-License-Identifier: Apache-2.0
"""Optimizers: DessiLBI and ``wrap``, the way of a step to its kernel, and how V is read.

``dual`` reads V for everybody; ``optimizer`` and ``wrapping`` are what users call; the others carry
options, loaded state and the fused step.
"""
