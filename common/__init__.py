import os

# Before torch starts its threads: those that wait by spinning make all of it ten times slower where another job wants
# the same cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
