"""`octavo diff`: where two computations of the same model differ, and which op to look at.

sides.py, native_side.py, hf_side.py  the computations that can be compared, all behind `Side`
run.py       runs two of them in lockstep, then greedy decoding, then prefill against decode
measure.py   error measures, one row (token) at a time, so that memory does not grow with width
local.py     every op once more by its definition, on the inputs the side itself had
suspects.py  tries the usual mistakes on a broken op, and says which one it is
tolerance.py the one table of tolerances, with the reason for each
report.py, html.py  the terminal table, and the page with the heat map
"""
