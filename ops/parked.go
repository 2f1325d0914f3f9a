package ops

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"

	"outbox-relay/outbox"
)

const (
	parkedListed = 50              // rows
	parkedFresh  = 5 * time.Second // however many look, Postgres is asked no more often
	parkedLimit  = 10 * time.Second
	retryBody    = 64 << 10 // bytes of a request
	retryRows    = 1000
)

// parked lists the events that have failed, as they are in Postgres, and asks
// only when somebody looks. Safe for concurrent use.
type parked struct {
	admin Admin

	mu    sync.Mutex
	asked time.Time
	list  parkedList
	err   error
}

// parkedList is what the page shows of them.
type parkedList struct {
	Failed int64              `json:"failed"`
	Exact  bool               `json:"exact"` // false: failed is a lower bound
	Rows   []outbox.FailedRow `json:"rows"`  // the newest
}

func (p *parked) get(ctx context.Context) (parkedList, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if time.Since(p.asked) < parkedFresh {
		return p.list, p.err
	}
	// What is found is for the next ones, too: it does not end with who asked.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), parkedLimit)
	defer cancel()
	p.list = parkedList{}
	p.err = p.admin.use(ctx, outbox.CensusSettings(), func(conn *pgx.Conn) (err error) {
		p.list.Failed, p.list.Exact, p.list.Rows, err = p.admin.Table.Failures(ctx, conn, parkedListed)
		return err
	})
	p.asked = time.Now()
	return p.list, p.err
}

// retry puts these rows back to pending, or all that were parked.
func (p *parked) retry(ctx context.Context, ids []string, all bool) (retried int64, err error) {
	ctx, cancel := context.WithTimeout(ctx, parkedLimit)
	defer cancel()
	err = p.admin.use(ctx, nil, func(conn *pgx.Conn) error {
		if all {
			retried, err = p.admin.Table.RetryAll(ctx, conn)
			return err
		}
		n, err := p.admin.Table.Retry(ctx, conn, unique(ids))
		retried = int64(n)
		return err
	})
	p.mu.Lock()
	defer p.mu.Unlock()
	p.asked = time.Time{} // what was listed is no more so
	return retried, err
}

func (s *Server) listParked(w http.ResponseWriter, r *http.Request) {
	list, err := s.parked.get(r.Context())
	if err != nil {
		refuse(w, http.StatusServiceUnavailable, err.Error())
		return
	}
	writeJSON(w, http.StatusOK, list)
}

// retryRequest is the body of a retry: ids, or all.
type retryRequest struct {
	IDs []string `json:"ids"`
	All bool     `json:"all"`
}

func (s *Server) retry(w http.ResponseWriter, r *http.Request) {
	if code, err := s.authorize(r); err != nil {
		if code == http.StatusUnauthorized {
			w.Header().Set("WWW-Authenticate", "Bearer")
		}
		refuse(w, code, err.Error())
		return
	}
	request, code, err := readRetry(w, r)
	if err != nil {
		refuse(w, code, err.Error())
		return
	}
	retried, err := s.parked.retry(r.Context(), request.IDs, request.All)
	if err != nil {
		refuse(w, http.StatusServiceUnavailable, err.Error())
		return
	}
	s.Log.Info("failed rows are pending again: the status page was asked to retry them", "rows", retried)
	writeJSON(w, http.StatusOK, map[string]int64{"retried": retried})
}

// authorize lets in who has the token, in the one header that no browser sends
// by itself.
func (s *Server) authorize(r *http.Request) (code int, err error) {
	if s.Token == nil {
		return http.StatusForbidden, errors.New("nothing can be changed here: OUTBOX_HTTP_TOKEN is not set")
	}
	want, err := s.Token()
	if err != nil {
		return http.StatusServiceUnavailable, err
	}
	scheme, given, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	a, b := sha256.Sum256([]byte(given)), sha256.Sum256([]byte(want))
	if !strings.EqualFold(scheme, "Bearer") || subtle.ConstantTimeCompare(a[:], b[:]) != 1 {
		return http.StatusUnauthorized, errors.New("this is not the token of OUTBOX_HTTP_TOKEN")
	}
	return 0, nil
}

func readRetry(w http.ResponseWriter, r *http.Request) (request retryRequest, code int, err error) {
	if r.Header.Get("Content-Type") != "application/json" {
		return request, http.StatusUnsupportedMediaType, errors.New("the body has to be application/json")
	}
	decoder := json.NewDecoder(http.MaxBytesReader(w, r.Body, retryBody))
	decoder.DisallowUnknownFields()
	err = decoder.Decode(&request)
	var large *http.MaxBytesError
	switch n := len(request.IDs); {
	case errors.As(err, &large):
		return request, http.StatusRequestEntityTooLarge, fmt.Errorf("the body has more than %d bytes", large.Limit)
	case err != nil:
		return request, http.StatusBadRequest, fmt.Errorf("read the body: %w", err)
	case request.All == (n > 0) || n > retryRows:
		return request, http.StatusBadRequest, fmt.Errorf("the body has to name all, or 1 to %d ids", retryRows)
	}
	return request, 0, nil
}

// refuse says why nothing was done.
func refuse(w http.ResponseWriter, code int, why string) {
	writeJSON(w, code, map[string]string{"error": why})
}
