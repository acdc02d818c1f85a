"""Attacks on certificates, and strict checks of what they find.

An audit that shared code with what it audits would share its mistakes: nothing here imports ``bounds`` or
``smoothing``, and a test walks the imports to keep it so. This module imports no torch, and neither does
:mod:`certbench.audit.registry`, so that attacks can be listed quickly.
"""
