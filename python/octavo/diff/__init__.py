"""`octavo diff`: where two computations of the same model differ, and which op to look at.

implementations.py, native.py, hugging_face.py  what can be compared, all behind `Implementation`
setup.py, comparison.py   load two of them, and run them in lockstep; then greedy decoding, then
                          prefill against decode
measure.py, tolerance.py  error measures, one row (token) at a time; the one table of tolerances
definition.py, ties.py    every op once more by its definition, on the inputs that the run had
suspects.py, findings.py, op_sources.py  what a broken op does instead, and where to look
report.py, html.py, texts.py  the terminal table, the page with the heat map, what both say
"""
