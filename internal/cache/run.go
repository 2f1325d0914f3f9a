package cache

import (
	"bytes"
	"fmt"
	"os/exec"
	"path/filepath"
	"time"
)

// Run runs cmd, which may take long, with a line of progress every few seconds.
// An error has the command's output.
func Run(logf func(format string, args ...any), cmd *exec.Cmd) error {
	var output bytes.Buffer
	cmd.Stdout, cmd.Stderr = &output, &output
	began := time.Now()
	ended := make(chan error, 1)
	go func() { ended <- cmd.Run() }()
	progress := time.NewTicker(5 * time.Second)
	defer progress.Stop()
	for {
		select {
		case <-progress.C:
			logf("still running %s (%s)", filepath.Base(cmd.Path), time.Since(began).Round(time.Second))
		case err := <-ended:
			if err != nil {
				return fmt.Errorf("%s: %w\n%s", filepath.Base(cmd.Path), err, bytes.TrimSpace(output.Bytes()))
			}
			return nil
		}
	}
}
