"""``amrlhf doctor``: what could keep a run from working here, found before it is started.

It has to work where the rest does not: torch is the only heavy library that it needs, and the ranks
meet over torch's key-value store, so that a broken network between them still gives a report.
Files named ``judge_*`` turn measured values into findings and measure nothing.
"""
