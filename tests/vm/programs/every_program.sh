#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# every_program.sh RUNS: run every program of /usr/bin again and again, with an option that
# ends it at once and with the caches dropped before each round, so that the page frames of
# one program's code keep being reused for another's. A program that dies from SIGILL, SIGSEGV,
# SIGBUS, SIGTRAP or SIGFPE is a crash. Prints "runs=R crashes=C"; exits 0 if C is 0.
runs=0 crashes=0
while [ $runs -lt "$1" ]; do
    echo 3 >/proc/sys/vm/drop_caches
    for program in /usr/bin/*; do
        [ $runs -lt "$1" ] || break
        [ -f "$program" ] && [ -x "$program" ] || continue
        timeout -s KILL 20 "$program" --version </dev/null >/dev/null 2>&1
        status=$?
        runs=$((runs + 1))
        case $status in
        132 | 133 | 135 | 136 | 139)
            crashes=$((crashes + 1))
            echo "$program: status $status"
            ;;
        esac
    done
done
echo "runs=$runs crashes=$crashes"
[ $crashes -eq 0 ]
