package ops

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"
)

// Healthcheck asks the relay that serves on addr whether it is well: for
// containers, which have no shell to ask with.
func Healthcheck(ctx context.Context, addr string) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	text, code, err := get(ctx, addr, "/healthz")
	if err != nil {
		return err
	}
	if code != http.StatusOK {
		return fmt.Errorf("the relay is not well: %s", strings.TrimSpace(string(text[:min(len(text), 200)])))
	}
	return nil
}

// get asks the relay that serves on addr.
func get(ctx context.Context, addr, path string) (body []byte, code int, err error) {
	if addr == "" {
		return nil, 0, fmt.Errorf("OUTBOX_HTTP_ADDR is empty: the relay serves no health check")
	}
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, 0, fmt.Errorf("OUTBOX_HTTP_ADDR: %w", err)
	}
	if ip := net.ParseIP(host); host == "" || ip.IsUnspecified() {
		host = "127.0.0.1" // an image without /etc/hosts does not know localhost
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+net.JoinHostPort(host, port)+path, nil)
	if err != nil {
		return nil, 0, err
	}
	request.Close = true
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return nil, 0, fmt.Errorf("ask the relay: %w", err)
	}
	defer response.Body.Close()
	body, err = io.ReadAll(io.LimitReader(response.Body, 1<<20))
	return body, response.StatusCode, err
}
