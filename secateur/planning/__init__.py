"""What a run would do, take and be good for, before anything is paid.

plan            the model by its shapes, and all that follows: begin here
shapes          the matrices of a block by role, and the calibration
cost            operations and bytes of every stage from shapes alone; cost_sparsellm, those of SparseLLM's modes
rates           how fast this machine does each kind of work
footprint       what a block at work holds in memory
report          PlanReport: operations at the measured rates, peaks, what the result is good for

Import from the modules. ``report.plan_page`` makes a page of it.
"""
