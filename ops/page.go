package ops

import (
	"embed"
	"encoding/json"
	"io/fs"
	"net/http"
	"strconv"

	"outbox-relay/relay"
)

//go:embed page
var page embed.FS

// pageFiles serves the status page: three files and an icon, which ask for
// nothing but the figures below.
func pageFiles() http.Handler {
	files, err := fs.Sub(page, "page")
	if err != nil {
		panic(err) // the directive above names another folder
	}
	return http.FileServerFS(files)
}

// pageStatus is what the page asks for once a second while somebody looks.
type pageStatus struct {
	Version      string  `json:"version"`
	Started      string  `json:"started"` // by which process
	Table        string  `json:"table"`
	Slot         string  `json:"slot"`
	Stream       string  `json:"stream"`
	AfterPublish string  `json:"after_publish"`
	State        string  `json:"state"`
	Trouble      string  `json:"trouble"` // what is in the way; empty: nothing
	Stalled      bool    `json:"stalled"`
	WALEnd       string  `json:"wal_end"`
	Received     string  `json:"received"`
	Confirmed    string  `json:"confirmed"` // LSNs; empty: no session yet
	Behind       *uint64 `json:"behind"`    // bytes of WAL that are not confirmed
	InFlight     int     `json:"in_flight"`
	InFlightSize int     `json:"in_flight_bytes"`
	Unrecorded   int     `json:"unrecorded"`
	Recordable   int     `json:"recordable"` // the most that unrecorded can be
	Published    float64 `json:"published"`
	Recorded     float64 `json:"recorded"`
	Parked       float64 `json:"parked"` // events, since the start
	BackfillLeft float64 `json:"backfill_left"`
	CanRetry     bool    `json:"can_retry"` // there is a token
	History      []point `json:"history"`
	Log          []entry `json:"log"`
}

// status answers with the present, and with what has been added to history and
// log since the caller's last look.
func (s *Server) status(w http.ResponseWriter, r *http.Request) {
	at := s.Relay.Present()
	status := pageStatus{
		Version: s.Version, Started: s.started, Table: s.Admin.Table.Schema + "." + s.Admin.Table.Name, Slot: s.Admin.Table.Slot, Stream: s.Stream,
		AfterPublish: string(s.Admin.Table.Mode),
		State:        string(at.State), Trouble: at.Trouble, Stalled: at.Stalled != "",
		Behind:   behind(at),
		InFlight: at.InFlight, InFlightSize: at.InFlightSize, Unrecorded: at.Unrecorded, Recordable: relay.Unrecordable,
		Published: at.Published, Recorded: at.Recorded, Parked: at.Parked, BackfillLeft: at.BackfillLeft,
		CanRetry: s.Token != nil,
		History:  s.history.after(number(r, "history")),
		Log:      s.Journal.after(number(r, "log")),
	}
	if at.Stalled != "" {
		status.Trouble = at.Stalled
	}
	if at.WALEnd != 0 {
		status.WALEnd, status.Received, status.Confirmed = at.WALEnd.String(), at.Received.String(), at.Confirmed.String()
	}
	writeJSON(w, http.StatusOK, status)
}

// number reads a parameter; 0 where it is none.
func number(r *http.Request, name string) int64 {
	n, _ := strconv.ParseInt(r.URL.Query().Get(name), 10, 64)
	return n
}

func writeJSON(w http.ResponseWriter, code int, what any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(what) // who has left needs no answer
}
