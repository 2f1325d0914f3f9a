package main

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// cpuTime is what the living threads of a process have run, user and system.
// Source: Documentation/scheduler/sched-stats.rst of Linux: the first number of a
// schedstat, in ns.
func cpuTime(pid int) (time.Duration, error) {
	var sum time.Duration
	err := eachThread(pid, "schedstat", func(text string) error {
		first, _, _ := strings.Cut(text, " ")
		ns, err := strconv.ParseInt(first, 10, 64)
		sum += time.Duration(ns)
		return err
	})
	return sum, err
}

// wakeUps is how often the living threads of a process have waited.
func wakeUps(pid int) (int64, error) {
	var sum int64
	err := eachThread(pid, "status", func(text string) error {
		n, err := statusField(text, "voluntary_ctxt_switches")
		sum += n
		return err
	})
	return sum, err
}

// peakMemory is the largest resident set of a process, in bytes. (What getrusage
// says of a child begins with the parent's.)
func peakMemory(pid int) (int64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	kib, err := statusField(string(text), "VmHWM")
	return kib << 10, err
}

func eachThread(pid int, file string, use func(text string) error) error {
	paths, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/%s", pid, file))
	if err == nil && len(paths) == 0 {
		err = fmt.Errorf("/proc/%d: no such process", pid)
	}
	for _, path := range paths {
		text, readErr := os.ReadFile(path)
		if readErr != nil {
			continue // the thread has ended
		}
		if err = use(string(text)); err != nil {
			return fmt.Errorf("read %s: %w", path, err)
		}
	}
	return err
}

func statusField(status, name string) (int64, error) {
	lines := bufio.NewScanner(strings.NewReader(status))
	for lines.Scan() {
		if value, ok := strings.CutPrefix(lines.Text(), name+":"); ok {
			return strconv.ParseInt(strings.Fields(value)[0], 10, 64)
		}
	}
	return 0, fmt.Errorf("no field %s", name)
}

// loadAverage tells how busy the machine was with other things: of 1, 5 and 15
// minutes.
func loadAverage() string {
	text, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "unknown"
	}
	return strings.Join(strings.Fields(string(text))[:3], " ")
}
