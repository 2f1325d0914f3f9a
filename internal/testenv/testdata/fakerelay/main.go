// Command fakerelay stands in for the relay in the tests of testenv. It shows
// its arguments and environment, says that it is ready, and leaves on SIGTERM.
package main

import (
	"fmt"
	"os"
	"os/signal"
	"slices"
	"syscall"
)

func main() {
	terminated := make(chan os.Signal, 1)
	signal.Notify(terminated, syscall.SIGTERM)
	fmt.Println("arguments:", os.Args[1:])
	for _, variable := range os.Environ() {
		fmt.Println("environment:", variable)
	}
	if slices.Contains(os.Args, "fail") {
		fmt.Fprintln(os.Stderr, "failing")
		os.Exit(3)
	}
	fmt.Fprintln(os.Stderr, "ready")
	<-terminated
	fmt.Println("drained")
	if os.Getenv("OUTBOX_EXIT") != "" {
		os.Exit(7)
	}
}
