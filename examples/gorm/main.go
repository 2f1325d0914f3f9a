// Command gorm places an order by GORM, and prints the id of its event.
package main

import (
	"fmt"
	"log"
	"os"

	"gorm.io/driver/postgres"
	"gorm.io/gorm"
)

// Order is a row of the table orders.
type Order struct {
	ID       int64  `json:"order"`
	Customer string `json:"customer"`
	Product  string `json:"product"`
	Quantity int    `json:"quantity"`
}

// Event is a row of the outbox, as far as the application fills it.
type Event struct {
	ID            string `gorm:"default:(-)"` // of the trigger
	AggregateType string
	AggregateID   string
	EventType     string
	Payload       any `gorm:"serializer:json"`
}

// Place writes the order and its event in one transaction, and returns the event.
func Place(db *gorm.DB, order *Order) (*Event, error) {
	event := &Event{AggregateType: "order", EventType: "placed", Payload: order}
	err := db.Transaction(func(tx *gorm.DB) error {
		if err := tx.Create(order).Error; err != nil {
			return err
		}
		event.AggregateID = fmt.Sprint(order.ID)
		return tx.Create(event).Error
	})
	return event, err
}

func main() {
	db, err := gorm.Open(postgres.Open(os.Getenv("DATABASE_URL")))
	if err != nil {
		log.Fatal(err)
	}
	event, err := Place(db, &Order{Customer: "Ada", Product: "tea pot", Quantity: 1})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(event.ID)
}
