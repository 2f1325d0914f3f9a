package config

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
	"text/tabwriter"
)

// Variable is one row of the table of variables.
type Variable struct {
	Name    string // in full, OUTBOX_ included
	Default string // empty, or "required"
	Meaning string
}

// Variables lists every variable that Load reads, in the table's order.
func Variables() []Variable {
	variables, _ := describe()
	return variables
}

// Usage is the table of variables for people.
func Usage() string {
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprint(w, "VARIABLE\tDEFAULT\tMEANING\n")
	for _, v := range Variables() {
		fmt.Fprintf(w, "%s\t%s\t%s\n", v.Name, v.Default, v.Meaning)
	}
	w.Flush() // a strings.Builder takes everything
	return b.String()
}

// serviceLink matches what Kubernetes puts into each container's environment
// for a Service named outbox or outbox-…, wanted or not.
var serviceLink = regexp.MustCompile(`^OUTBOX_([A-Z0-9_]+_)?(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?|PORT_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)$`)

// unknown finds the variables with our prefix that Load does not read. Values
// are never printed.
func unknown(environ []string, known []Variable) faults {
	var found faults
	for _, entry := range slices.Sorted(slices.Values(environ)) {
		name, value, _ := strings.Cut(entry, "=")
		switch {
		case !strings.HasPrefix(name, prefix+"_"):
		case slices.ContainsFunc(known, func(v Variable) bool { return v.Name == name }):
		case isServiceLink(name, value):
		default:
			found.add(name, "is not known: %s", suggestion(name, known))
		}
	}
	return found
}

func isServiceLink(name, value string) bool {
	return serviceLink.MatchString(name) || strings.HasSuffix(name, "_PORT") && strings.Contains(value, "://")
}

// suggestion names the nearest variable when it is near enough for a typing
// error.
func suggestion(name string, known []Variable) string {
	typed := strings.TrimPrefix(strings.ToUpper(name), prefix+"_")
	best, distance := "", max(1, min(4, len(typed)/2))+1
	for _, v := range known {
		if d := editDistance(typed, strings.TrimPrefix(v.Name, prefix+"_")); d < distance {
			best, distance = v.Name, d
		}
	}
	if best == "" {
		return "unset it, or see outbox-relay help for the variables there are"
	}
	return "a typing error? did you mean " + best
}

// editDistance counts the bytes to insert, delete or replace.
func editDistance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			diagonal, row[j+1] = row[j+1], min(row[j+1]+1, row[j]+1, diagonal+cost)
		}
	}
	return row[len(b)]
}
