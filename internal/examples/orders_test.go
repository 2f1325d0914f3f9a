package examples

import (
	"io"
	"net/http"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"github.com/jackc/pgx/v5"

	"outbox-relay/internal/testenv"
)

const order = `{"order": 1, "customer": "Ada", "product": "cup", "quantity": 2}`

// requireEffects fails the test unless order 1 has had its effects of one time.
func (s *shop) requireEffects(consumer string) {
	s.Helper()
	s.require(1, `select count(*) from inbox where consumer = $1`, consumer)
	if consumer == "email" {
		s.require(1, `select count(*) from mails where order_id = 1`)
		return
	}
	s.require(1, `select count(*) from parcels where order_id = 1`)
	s.require(8, `select count from shelf where product = 'cup'`)
}

// An event that stands in the stream twice has one effect.
func TestEventThatComesTwice(t *testing.T) {
	for _, service := range []string{"inventory", "email"} {
		t.Run(service, func(t *testing.T) {
			s := setup(t)
			consumer := s.start(service, "msg=consuming")
			s.publish("first", "event_1", order)
			s.publish("second", "event_1", order)
			consumer.WaitLog("again=true")
			s.awaitAnswered(service, 2)
			s.requireEffects(service)
			if code := consumer.Terminate(); code != 0 {
				t.Errorf("exit code %d", code)
			}
		})
	}
}

// hold locks what the consumer must write, waits until it does wait there, and
// returns what lets it go on.
func (s *shop) hold(table string, publish func()) (release func()) {
	s.Helper()
	tx, err := s.connect().Begin(s.Context())
	s.must(err)
	_, err = tx.Exec(s.Context(), "lock table "+pgx.Identifier{table}.Sanitize()+" in exclusive mode")
	s.must(err)
	publish()
	testenv.Eventually(s, "the consumer to wait for "+table, func() bool {
		return s.count(`select count(*) from pg_locks where not granted and relation = $1::regclass`, table) == 1
	})
	return func() { s.Helper(); s.must(tx.Commit(s.Context())) }
}

// A consumer that dies when its work is committed and its ack is not sent gets
// the same message again, which changes nothing. The server is away meanwhile, so
// that the ack cannot be sent.
func TestDeathBetweenCommitAndAck(t *testing.T) {
	for service, table := range map[string]string{"inventory": "shelf", "email": "mails"} {
		t.Run(service, func(t *testing.T) {
			s := setup(t)
			first := s.start(service, "msg=consuming")
			release := s.hold(table, func() { s.publish("event_1", "event_1", order) })
			s.nats.Stop()
			release()
			testenv.Eventually(t, "the commit", func() bool { return s.count(`select count(*) from inbox`) == 1 })
			first.Kill()
			s.nats.Restart()

			second := s.start(service, "msg=consuming")
			second.WaitLog("again=true")
			s.awaitAnswered(service, 1)
			s.requireEffects(service)
		})
	}
}

// A consumer that dies before its commit leaves nothing, and the next one does
// the work.
func TestDeathBeforeCommit(t *testing.T) {
	s := setup(t)
	first := s.start("inventory", "msg=consuming")
	release := s.hold("shelf", func() { s.publish("event_1", "event_1", order) })
	first.Kill()
	release()
	second := s.start("inventory", "msg=consuming")
	second.WaitLog("msg=handled")
	s.awaitAnswered("inventory", 1)
	s.requireEffects("inventory")
}

// SIGTERM lets a consumer finish what it has begun, with its ack.
func TestConsumerStopsInOrder(t *testing.T) {
	s := setup(t)
	consumer := s.start("inventory", "msg=consuming")
	release := s.hold("shelf", func() { s.publish("event_1", "event_1", order) })
	consumer.Signal(syscall.SIGTERM)
	release()
	if code := consumer.Wait(patience); code != 0 {
		t.Errorf("exit code %d", code)
	}
	s.awaitAnswered("inventory", 1)
	s.requireEffects("inventory")
}

// An error that passes lets the event come again later, before those behind it.
func TestErrorThatPasses(t *testing.T) {
	s := setup(t)
	consumer := s.start("inventory", "msg=consuming")
	s.publish("event_0", "event_0", `{"order": 2, "customer": "Ben", "product": "pot", "quantity": 1}`)
	s.publish("event_1", "event_1", order)
	consumer.WaitLog("no shelf has a pot")
	s.require(0, `select count(*) from inbox`)
	s.exec(`insert into shelf values ('pot', 1)`)
	s.awaitAnswered("inventory", 2)
	s.requireEffectsInOrder("event_0", "event_1")
}

func (s *shop) requireEffectsInOrder(events ...string) {
	s.Helper()
	var got []string
	s.must(s.sql.QueryRow(s.Context(), `select array_agg(event_id order by handled_at) from inbox`).Scan(&got))
	if strings.Join(got, " ") != strings.Join(events, " ") {
		s.Errorf("handled %v, want %v", got, events)
	}
}

// An event that can never be handled is told of, and holds nobody up.
func TestMalformedEvent(t *testing.T) {
	for name, message := range map[string][2]string{
		"not an order": {"event_0", `{"order": "first"}`},
		"no customer":  {"event_0", `{"order": 2, "product": "cup", "quantity": 1}`},
		"no JSON":      {"event_0", `cup`},
		"no id":        {"", order},
	} {
		t.Run(name, func(t *testing.T) {
			s := setup(t)
			consumer := s.start("inventory", "msg=consuming")
			s.publish("event_0", message[0], message[1])
			s.publish("event_1", "event_1", order)
			consumer.WaitLog("never handled")
			s.awaitAnswered("inventory", 2)
			s.requireEffects("inventory")
		})
	}
}

// Order, event and reservation are there together or not at all.
func TestShop(t *testing.T) {
	s := setup(t)
	service := s.start("shop", "msg=serving")
	address := regexp.MustCompile(`address=(\S+)`).FindStringSubmatch(service.Logs())[1]
	post := func(body string) (status int, answer string) {
		response, err := http.Post("http://"+address+"/orders", "application/json", strings.NewReader(body))
		s.must(err)
		defer response.Body.Close()
		text, err := io.ReadAll(response.Body)
		s.must(err)
		return response.StatusCode, string(text)
	}
	for body, want := range map[string]int{
		`{"customer": "Eve", "product": "cup", "quantity": 11}`: http.StatusConflict,
		`{"customer": "Eve", "product": "pot", "quantity": 1}`:  http.StatusConflict,
		`{"customer": "Eve", "product": "cup", "quantity": -1}`: http.StatusBadRequest,
		`cup`: http.StatusBadRequest,
	} {
		if status, answer := post(body); status != want {
			t.Errorf("%s: %d %s, want %d", body, status, answer, want)
		}
	}
	s.require(0, `select (select count(*) from orders) + (select count(*) from events where aggregate_type <> 'history')`)

	status, answer := post(`{"customer": "Ada", "product": "cup", "quantity": 2}`)
	if status != http.StatusCreated {
		t.Fatalf("%d %s", status, answer)
	}
	s.require(8, `select available from stock where product = 'cup'`)
	s.require(1, `select count(*) from orders as o join events as e on e.aggregate_id = o.id::text
		where e.aggregate_type = 'order' and e.event_type = 'placed' and position(e.id in $1) > 0
			and e.payload = jsonb_build_object('order', o.id, 'customer', 'Ada', 'product', 'cup', 'quantity', 2)`, answer)
	http.DefaultClient.CloseIdleConnections()
	if code := service.Terminate(); code != 0 {
		t.Errorf("exit code %d", code)
	}
}
