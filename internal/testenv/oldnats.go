package testenv

import (
	"bufio"
	"fmt"
	"net"
	"testing"
)

// OldNATS greets like a server of that version: no module builds one that is
// old beside the embedded one.
func OldNATS(tb testing.TB, version string) string {
	tb.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { listener.Close() })
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return // closed
			}
			go func() {
				defer conn.Close()
				fmt.Fprintf(conn, `INFO {"server_id":"OLD","version":%q,"proto":1,"headers":true,"jetstream":true,"max_payload":1048576}`+"\r\n", version)
				for lines := bufio.NewScanner(conn); lines.Scan(); {
					if lines.Text() == "PING" {
						fmt.Fprint(conn, "PONG\r\n")
					}
				}
			}()
		}
	}()
	return "nats://" + listener.Addr().String()
}
