# SPDX-License-Identifier: Apache-2.0
"""Dynamics: path time, and what moves or watches nu, lambda and kappa along it.

``calibration`` finds lambda for a wanted density; ``clock`` and ``scheduling`` are for loops of
one's own; ``safety``, ``forecast`` and ``monitors`` say what to expect.
"""
