"""Fuzzing campaigns: thousands of inputs that are damaged, hostile or odd, each judged by what the user would see.

    python tests/fuzz --count 50000 --seed 0 --only headers --only data

Every input is made from campaign, seed and number alone, so that a failure can be made again (``--replay headers:17``).
"""
