"""What a run would do, take and be good for, before anything is paid.

plan            the model by its shapes, and all that follows: begin here
subject         the model as a plan sees it
shapes          the matrices of a block by role, and the calibration
cost            operations and bytes of every stage from shapes alone; cost_sparsellm, those of SparseLLM's modes
rates           how fast this machine does each kind of work
footprint       what a block at work holds in memory
sizes           peaks of the whole run, and what the result takes
report          PlanReport: operations at the measured rates, sizes, what the result is good for

Import from the modules. ``report.plan_page`` makes a page of it.
"""
